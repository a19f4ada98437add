"""The prompts of student and teacher, and what they need: the canonical mathematical notation, the
anchors of a solution, masking, and rationales."""
