"""What vgen is measured against, written as its users would write it."""
