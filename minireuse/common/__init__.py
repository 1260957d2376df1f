"""What the workshops share."""
