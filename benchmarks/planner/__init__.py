"""The planner against the schemes in use."""
