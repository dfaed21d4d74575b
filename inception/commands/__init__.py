"""The command line: what all commands have in common (`line`), and each command beside its options."""
