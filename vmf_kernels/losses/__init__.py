"""The published losses: schedules, pairings and averages around one stream of rows."""
