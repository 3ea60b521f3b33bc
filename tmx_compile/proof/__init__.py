"""Reading a mask as functions of (batch, head, row, key), and concluding what it is."""
