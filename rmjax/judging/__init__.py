"""What a judge is asked and answers: `questions` shows responses through the templates, `verdicts` reads and compares
verdicts, and `writing` makes the text that a judge learns to write.
"""
