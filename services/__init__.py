"""What people and other systems touch: the command line, Label Studio, S3, serving."""
