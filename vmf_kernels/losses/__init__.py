"""The published losses: schedules, pairings and averages around a stream of rows."""
