"""The two ranking models: OneTrans and the DCNv2+DIN baseline."""
