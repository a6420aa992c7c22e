"""Track-B: distil an embedding teacher into small students, and measure how good they are."""
