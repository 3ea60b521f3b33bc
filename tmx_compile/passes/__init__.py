"""The pass, stage by stage."""
