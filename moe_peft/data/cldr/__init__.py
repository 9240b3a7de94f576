"""The embedded suite: text-to-text tasks from the Unicode CLDR data of `babel`. No TensorFlow."""
