"""What an operator types: ``regrow up``, ``fault``, ``status``, ``events``, ``eval``, ``demo``; one file a command."""
