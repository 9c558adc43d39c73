//! What an operator talks to.
