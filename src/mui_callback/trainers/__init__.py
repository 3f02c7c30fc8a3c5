"""What is particular to one trainer."""
