"""What is measured on the base and after every stage, one file per kind of metric."""
