"""How other programs run what convgen makes."""
