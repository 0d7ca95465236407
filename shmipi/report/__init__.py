"""What people read: tables and texts made from results."""
