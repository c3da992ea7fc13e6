"""Pictures with objects: read, drawn prompts for, hidden, varied, encoded once, and shared out."""
