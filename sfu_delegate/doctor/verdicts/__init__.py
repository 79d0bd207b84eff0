"""What was seen, and what it means: pure functions from the one to the other, so that each verdict can be tested in a table."""
