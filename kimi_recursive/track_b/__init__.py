"""Track-B: distil an embedding teacher into a small student, and see what a student is worth."""
