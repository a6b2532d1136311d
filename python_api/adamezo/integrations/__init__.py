"""One file for each outside library, imported only when used."""
