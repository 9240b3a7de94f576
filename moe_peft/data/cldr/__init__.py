"""The embedded suite: text-to-text tasks made from the Unicode CLDR data of `babel`. No TensorFlow."""
