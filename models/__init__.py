"""The torch side: reference victims, attacks and the data they are trained on."""
