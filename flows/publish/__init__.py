"""`trivium publish`: what goes, to a folder, to the hub."""
