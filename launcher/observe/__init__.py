"""Looking inside pods: who talks to whom, how much, through which sockets. Reads; changes nothing.

sample    a pod at one moment: links, flows, counters, guests' processes
sockets   the sockets of the processes in a pod's namespace
follow    two flow tables -> what has happened between them
drops     each packet that is dropped
stats     two samples -> rates
ports     who serves what
pcap      packets, by dumpcap
graph     a picture
metrics   for Prometheus
"""
