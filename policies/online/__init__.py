"""Online planning: from the plan in force to the next, as tasks arrive and leave (`replan.py` is its door)."""
