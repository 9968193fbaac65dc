"""What runs did, for a person: tables, pictures and pages. Reads the files of run directories; makes none of them."""
