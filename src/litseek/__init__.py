"""litseek: the DeepSeek-V3 system as one Lightning research codebase."""

__version__ = "0.1.0"
