"""MoE blocks in standard ops, recognised by what they compute and not by how it is written."""
