"""What turns a rewritten graph into code."""
