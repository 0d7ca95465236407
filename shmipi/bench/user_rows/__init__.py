"""What ``shmipi bench users`` measures: a module for each user, found by its name."""
