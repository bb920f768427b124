"""placeholder: the control helper replaces this file."""
