"""The Ray cluster: joining one, jobs and what they take along, signals, nodes that will go.

In: an address or a dashboard. Out: a connection, a job, a notice.
"""
