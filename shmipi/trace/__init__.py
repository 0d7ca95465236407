"""What a machine counts and records, and the views of it."""
