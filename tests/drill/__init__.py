"""The drill: what goes wrong for users, as data, with what upbench promises for it (docs/reliability.md)."""
