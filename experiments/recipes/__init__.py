"""What the paper states or a law says, each in one file: run by `muxtune paper`, asserted by tests/test_recipes.py."""
