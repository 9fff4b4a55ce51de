pub struct FlopsReport;
