"""The command line: one module for each command; nothing heavy is imported before a command needs it."""
