"""Random layers and random candidates through the full validation, to find failures that nobody thought of."""
