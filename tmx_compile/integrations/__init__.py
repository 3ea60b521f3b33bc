"""Where other projects reach this one."""
