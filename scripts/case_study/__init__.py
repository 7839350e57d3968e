"""The live case study: `python scripts/live_case_study.py`. Chapter 13; paper 4."""
