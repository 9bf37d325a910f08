"""Is a whole network right: drawn ones, bounds of rounding errors, where tensors lie, and what a report says of it."""
