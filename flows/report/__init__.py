"""The report of a chain: one HTML page that needs nothing else, from the disk alone."""
