"""What a run does with its pair and policy, one file a task; each returns the task's part of the record."""
