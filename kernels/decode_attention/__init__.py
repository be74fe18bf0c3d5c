"""One query per row against a prefix shared by its group and a suffix of its own."""
