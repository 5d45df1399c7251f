"""What it takes when there are many cells: memory that does not grow, under limits that would show it."""
