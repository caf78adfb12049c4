"""Pictures: losses, schedules and timelines."""
