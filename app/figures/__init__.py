"""Figures as plain dictionaries: arrays in, Plotly figure out. Nothing here knows Streamlit.

A colour is written `@name` and looked up in the palette where the figure is drawn, so one figure serves both themes.
"""
