"""The rules language: what a rules file may say, how it is read, and what it decides."""
