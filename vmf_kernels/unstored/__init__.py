"""What stands for a [rows, K] tensor that is not stored: logits, and a teacher's targets."""
