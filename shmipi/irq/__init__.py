"""Interrupt controllers, and what stands between them and the layers above."""
