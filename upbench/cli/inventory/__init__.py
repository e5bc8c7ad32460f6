"""What there is: as rows for `upbench list`, and in full for `upbench describe`."""
