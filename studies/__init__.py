"""What was found out once about triangle attention: ``python -m studies.run`` measures it again."""
